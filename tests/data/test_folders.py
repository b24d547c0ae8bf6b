"""A folder as people have it: what is text is read, the rest is left out and counted, and nothing takes it all down."""

import bz2
import gzip
import json
import os
import tarfile
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import DataError, UserError
from lamda.data import archives, file_formats, files, records, sections, streams
from lamda.data.card import Source
from lamda.data.documents import Document
from lamda.data.encodings import decoded
from lamda.data.files import File
from lamda.data.inflate import Chunk
from lamda.data.lanes import Cursor
from lamda.data.pages import text_of_page
from lamda.data.partitioning import whole_lane
from lamda.data.quarantine import BadLine
from lamda.data.records import read_array
from lamda.data.resolving import find, resolve
from lamda.data.sections import SECTION, read_sections
from tests.data.ranks import SINGLE, SUFFIXES, write_archive, write_file


def source_of(*patterns):
    return Source(name="s", license="none", files=tuple(map(str, patterns)))


def texts_of(source, found=None):
    entries = [
        entry for file in found or resolve(source) for entry in whole_lane(source, file).read(Cursor())
    ]  # fmt: skip
    return [entry.text if isinstance(entry, Document) else entry for entry in entries]


def named(folder, name, data=b"text"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_mixed_folder_is_read_in_the_order_of_names_and_the_rest_is_counted(tmp_path):
    folder = tmp_path / "f"
    for number, suffix in enumerate(SUFFIXES):
        lines = [[number, 1]] if suffix in SINGLE else [[number, 1], [number, 2]]
        write_file(named(folder, f"{number:02}{suffix}"), lines)
    named(folder, "sub/[1] *?,.py", b"99 1")
    for name in (".git/config.txt", ".hidden.txt", "__pycache__/a.txt"):
        named(folder, name)
    for name in ("a.png", "b.png", "c.docx", "Makefile"):
        named(folder, name, b"\x89PNG")
    found = find(source_of(folder))
    wanted = [f"{n} {k}" for n, suffix in enumerate(SUFFIXES) for k in ((1,) if suffix in SINGLE else (1, 2))]
    assert texts_of(source_of(folder), found.files) == [*wanted, "99 1"]
    assert found.left_out.counts == {".png": 2, ".docx": 1, "without a suffix": 1}
    assert "2 .png (" in str(found.left_out)
    assert [file.url for file in resolve(source_of(folder, folder / "sub"))] == [file.url for file in found.files]


def test_what_cannot_be_read_in_a_folder_is_left_out_and_named_by_itself_it_is_an_error(tmp_path):
    folder = tmp_path / "f"
    good = named(folder, "good.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "loop").symlink_to(folder)
    named(folder, "empty.zip", b"")
    named(folder, "empty.txt", b"")
    named(folder, "short.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    named(folder, "other.json", b'{\n"name": "a package",\n"version": 1\n}')
    named(folder, "picture.txt", bytes(range(256)) * 9)
    named(folder, "runs/a/status.json", b"{}")
    named(folder, "runs/a/samples/x.txt")
    write_archive(folder / "nested.zip", [("inner.zip", b"PK"), ("x.tar", b"")])
    found = find(source_of(folder))
    assert [file.url for file in found.files] == [str(good)]
    message = str(found.left_out)
    for part in ("1 not a file", "2 cannot be read", "1 cannot be read as zip", "ends inside a compressed frame",
                 "not JSON", "not text", "1 is empty", "1 holds no text", "folders of a run"):  # fmt: skip
        assert part in message, (part, message)
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        resolve(source_of(folder / "gone.txt"))
    good.unlink()
    with pytest.raises(UserError, match=r"none of its \d+ files can be read: .*text is read from .jsonl"):
        resolve(source_of(folder))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="no file"):
        resolve(source_of(tmp_path / "bare"))


def test_archives_that_would_expand_without_end_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_OUTPUT", 1 << 20)
    monkeypatch.setattr(archives, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(streams, "LONGEST_LINE", 1 << 20)
    spaces = b" " * (1 << 25)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.txt", spaces)
        archive.writestr("1.jsonl", spaces)
        archive.writestr("2.txt", "good")
    named(tmp_path, "b.md.bz2", bz2.compress(spaces))
    del spaces
    tracemalloc.start()
    try:
        found = texts_of(source_of(tmp_path / "a.zip"))
        with pytest.raises(DataError, match=r"b\.md\.bz2: one document of more than"):
            texts_of(source_of(tmp_path / "b.md.bz2"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(found[0], BadLine)
    assert "a document of more than" in found[0].reason
    assert (found[0].place[-7:], found[-1]) == ("(0.txt)", "good")
    assert peak < 60 << 20
    # The same bytes listed many times, as the bombs of overlapping members do.
    path = named(tmp_path, "bomb.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", bytes(1 << 20))
        archive.filelist *= 100
    with pytest.raises(DataError, match=r"bomb\.zip: states more text than"):
        texts_of(source_of(path))


def test_a_damaged_member_is_counted_and_the_others_are_read(tmp_path):
    write_archive(tmp_path / "a.zip", [("0.txt", b"zero"), ("1.txt", b"one" * 99), ("2.txt", b"two")])
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"1.txt") + 8] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    first, bad, last = texts_of(source_of(tmp_path / "a.zip"))
    assert (first, last) == ("zero", "two")
    assert bad.place.endswith("a.zip, line 2 (1.txt)")
    write_archive(tmp_path / "b.tar", [("0.txt", b"zero"), ("1.txt", b"one" * 999)])
    os.truncate(tmp_path / "b.tar", 2000)
    write_archive(tmp_path / "c.tar.gz", [("0.txt", b"zero"), ("1.txt", os.urandom(9999).hex().encode())])
    os.truncate(tmp_path / "c.tar.gz", 5000)
    for name in ("b.tar", "c.tar.gz"):
        with pytest.raises(DataError, match=f"{name}: .*truncated"):
            texts_of(source_of(tmp_path / name))


def test_a_tar_that_is_damaged_between_members_is_not_taken_for_a_shorter_one(tmp_path):
    path = tmp_path / "a.tar"
    write_archive(path, [("0.txt", b"zero"), ("1.txt", b"one"), ("2.txt", b"two")])
    whole = path.read_bytes()
    assert texts_of(source_of(path)) == ["zero", "one", "two"]
    for damaged in (whole[:2048], whole[:2148], whole[:1024] + b"x" + whole[1025:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar: cannot be read as tar"):
            texts_of(source_of(path))


def test_a_name_without_end_in_a_tar_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    path = named(tmp_path, "a.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(9999))
    with pytest.raises(DataError, match=r"a header of 1,099,511,627,776 bytes"):
        texts_of(source_of(path))


def test_members_are_read_in_their_encodings_and_those_of_other_kinds_are_counted(tmp_path):
    text = "Le café était fermé à Noël, où l'été naît déjà."
    line = json.dumps({"text": text}, ensure_ascii=False)
    members = [("a.csv", f'text\n"{text}"\n'.encode("latin-1")), ("b.jsonl", line.encode("latin-1")),
               ("c.json", f"[{line}]".encode("utf-16")), ("../d.txt", text.encode("latin-1"))]  # fmt: skip
    others = [("e.png", b""), ("f/g.png", b""), ("h.zip", b"PK"), (".hidden.png", b""), ("Makefile", b"")]
    for name in ("a.zip", "b.tar.gz"):
        write_archive(tmp_path / name, members + others)
        found = find(source_of(tmp_path / name))
        assert texts_of(source_of(tmp_path / name), found.files) == [text] * 4
        assert found.left_out.counts == {".png": 2, ".zip": 1, "without a suffix": 1}
        assert found.left_out.first[".png"] == f"{tmp_path / name}/e.png"


def test_lines_of_two_encodings_are_read_or_counted_and_never_garbled(tmp_path):
    text = "Le café était fermé à Noël, où l'été naît déjà."
    line = json.dumps({"text": text}, ensure_ascii=False)
    found = texts_of(source_of(named(tmp_path, "a.jsonl", b"\n".join([line.encode(), line.encode("latin-1")] * 9))))
    assert [each for each in found if isinstance(each, str)] == [text] * 9
    assert sum(isinstance(each, BadLine) for each in found) == 9


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda v: st.lists(v, max_size=3)), max_size=9
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)
def test_an_array_is_read_item_by_item_however_it_arrives(items, size, indent):
    data = json.dumps(items, indent=indent, ensure_ascii=False).encode()
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    chunks = [Chunk(part, n * size, n * size + len(part), len(part)) for n, part in enumerate(parts)]
    found = list(read_array(chunks, "x"))
    assert [item.value for item in found] == items
    assert [item.number for item in found] == list(range(len(items)))
    assert all(0 <= item.stored <= len(data) for item in found)
    with pytest.raises(DataError, match="x: item"):
        list(read_array(chunks[:-1], "x"))


def test_a_lone_surrogate_makes_a_bad_record_wherever_it_is(tmp_path):
    path = named(tmp_path, "a.json", b'[{"text": "a", "d": "\\ud800"}, {"text": "\\ud800", "d": "x"}, {"text": "b"}]')
    *bad, good = texts_of(source_of(path).model_copy(update={"domain": "d"}))
    assert [each.reason.partition(" (")[0] for each in bad] == ["a lone surrogate"] * 2
    assert good == "b"


def test_text_after_the_end_of_an_array_is_an_error(tmp_path):
    for text in (b"[1]\n[2]\n", b"[]x", b"[1]" + b" " * (1 << 20) + b"{}"):
        with pytest.raises(DataError, match="more text follows the end of its JSON array"):
            list(read_array(streams.chunks_of(resolve(source_of(named(tmp_path, "a.json", text)))[0]), "a.json"))


def test_an_item_that_never_ends_is_an_error_and_not_all_memory(monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 16)
    taken = []

    def chunks():
        yield Chunk(b'["', 0, 2, 2)
        for n in range(1 << 20):
            taken.append(n)
            yield Chunk(b"x" * 4096, n, n + 1, 4096)

    with pytest.raises(DataError, match="item 1 of its JSON array cannot be read"):
        list(read_array(chunks(), "x"))
    assert len(taken) < 50


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "é", " ", "\n", "xyz" * 9, "字" * 5]), max_size=300), st.integers(3, 40))
def test_sections_are_the_text_and_begin_anywhere(tmp_path_factory, parts, size):
    text = "".join(parts)
    path = named(tmp_path_factory.mktemp("s"), "a.txt", text.encode())
    file = File(str(path), path.stat().st_size, is_sectioned=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "SECTION", size)
        whole = list(read_sections(file, first=0))
        assert "".join(section.data.decode() for section in whole) == text
        assert [section.byte for section in whole] == [
            sum(len(each.data) for each in whole[:place]) for place in range(len(whole))
        ]
        for place, section in enumerate(whole):
            assert list(read_sections(file, first=section.number)) == whole[place:]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_long_text_is_read_in_sections_and_cut_anywhere(tmp_path, monkeypatch, suffix):
    lines = [f"line {n}" for n in range(200_000)]
    data = "\n".join(lines).encode()
    path = named(tmp_path, f"a{suffix}", gzip.compress(data, 0) if suffix == ".txt.gz" else data)
    (file,) = resolve(source_of(path))
    assert file.is_sectioned
    found = texts_of(source_of(path), [file])
    assert "".join(found) == data.decode()
    assert all(abs(len(each) - SECTION) < 99 for each in found[:-1])


ENCODED = {
    "cp1252": "Il était une fois, à la lisière d'une forêt, une maison où vivait une grand-mère. Ça n'était rien.",
    "latin-1": "Der Müller fährt über die Straße nach Köln und grüßt die Käufer. Später möchte er ein Stück Kuchen.",
    "iso8859_15": "Le café était fermé à Noël, où l'été naît déjà.",
    "windows-1250": "Sva ljudska bića rađaju se slobodna i jednaka u dostojanstvu i pravima. Ona su obdarena sviješću.",
    "windows_1250": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Űrhajó, fűnyíró, ősz.",
    "cp1254": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "cp1257": "Visi žmonės gimsta laisvi ir lygūs savo orumu ir teisėmis. Jiems suteiktas protas ir sąžinė.",
    "cp1250": "Zażółć gęślą jaźń. Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "cp1251": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "koi8_r": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "cp932": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "gb18030": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "utf_16": "Der Müller",
    "utf-8-sig": "Der Müller",
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_texts_in_usual_encodings_are_read_and_the_encoding_is_known(tmp_path, encoding):
    text = ENCODED[encoding]
    assert decoded(text.encode(encoding)) == text
    for suffix, content in ((".txt", text), (".jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")):
        path = named(tmp_path, f"a{suffix}", content.encode(encoding))
        (file,) = resolve(source_of(path))
        assert (file.encoding is None) == encoding.startswith("utf-8")
        assert texts_of(source_of(path), [file]) == [text]


def test_utf8_with_damage_is_not_taken_for_another_encoding():
    text = "я" * 900
    data = text.encode()
    assert decoded(data[:100] + b"\xff" + data[100:]) == data[:100].decode() + "\ufffd" + data[100:].decode()


def test_a_page_is_read_as_a_reader_sees_it():
    page = "<title>t</title><script>var x</script><p>Hello <b>w</b>orld &amp;</p><!-- c --><ul><li>one</ul>"
    assert text_of_page(page).split() == ["Hello", "world", "&", "•", "one"]
