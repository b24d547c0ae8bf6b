"""Checkpoints as W&B artifacts: one collection a run, one version a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lamda.storage import commit


def log_checkpoint(run: Any, path: Path, *, way: Literal["reference", "upload"], best: bool) -> None:
    """Log a complete checkpoint as the next version of artifact `<run id>-checkpoint`, of type "model".

    way: "reference" stores the manifest and the files' addresses, "upload" the files. Metadata: the step,
    and size and sha256 of every file. Aliases: "latest", the folder's name, and "best" if it is that.
    Raises OSError where the checkpoint is gone, and the library's errors.
    """
    import wandb

    content = commit.read(path)
    artifact = wandb.Artifact(
        f"{run.id}-checkpoint", type="model", metadata={"step": content["step"], "files": content["files"]}
    )
    # A checkpoint never changes: nothing needs to be copied before it is read.
    if way == "upload":
        artifact.add_dir(str(path), policy="immutable", skip_cache=True)
    else:
        # Unlike the addresses, the manifest differs between two checkpoints of one name.
        artifact.add_file(str(path / commit.MANIFEST), policy="immutable", skip_cache=True)
        artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
    run.log_artifact(artifact, aliases=["latest", path.name, *(["best"] if best else [])])
