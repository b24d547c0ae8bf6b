"""A run of two ranks that loses its disk continues from an S3 server as if nothing had happened."""

import shutil
import time

import pytest

from lamda.storage.mirror import Mirror
from tests.s3 import s3_bucket


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_lost_disk_is_restored_bit_for_bit(place, straight, end):
    with s3_bucket() as address:
        run, flags = f"lost-{end}", ("--checkpoint.mirror", address)
        if end == "stopped":
            assert place.run(run, *flags, fault="forward:term:0:6") == [75, 75], place.log(run)
        else:  # while steps are slow, step 3 is copied
            ranks = place.start(run, *flags, fault="fetch:slow:0:*")
            mirror, deadline = Mirror(address, place.folder / run), time.monotonic() + 600
            while not mirror.checkpoints().get("step-00000003"):
                assert time.monotonic() < deadline, place.log(run)
                time.sleep(0.5)
            for rank in ranks:
                rank.kill()
                rank.wait()
        shutil.rmtree(place.folder / run)
        place.finish(run, *flags)
        assert "fetching step-0000000" in place.log(run)
        assert place.difference(straight(1), run) is None
