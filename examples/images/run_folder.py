"""The folder of a run: protection of existing files, a lock for one training, and its output files."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.csv_table import write_rows
from common.files import new_file, save_atomically, write_json, write_text

from images.provenance import PRETRAINED_PART
from images.sources import Sources
from images.training import Training


def refuse_existing(out: Path, resume: bool) -> None:
    """Raises ValueError if ``out`` contains files that this training would overwrite."""
    if (out / "last.pt").exists():
        if not resume:
            raise ValueError(f"out: {out} holds a run; continue it with --resume, or name another folder")
        return
    # An interruption at the end of the first epoch leaves best.pt without the other two files. It may be overwritten.
    if (out / "best.pt").exists() and (out / "history.csv").exists():
        raise ValueError(f"out: {out} holds a best.pt and a history.csv, but no last.pt; name another folder")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Prevents other processes from training into ``out`` while this process runs.

    Raises:
        ValueError: another process trains into ``out``.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: child processes would keep it
        except (BlockingIOError, PermissionError):
            raise ValueError(f"out: another training writes into {out}; wait, or use another --out") from None
        except OSError:  # a file system without locks
            pass
        yield


class RunFolder:
    """The run folder, which only the first process writes."""

    def __init__(self, out: Path, sources: Sources, training: Training, resume: bool):
        """Writes the files that are known before the first step. Removes a best.pt without last.pt."""
        self.out = out
        if not (out / "last.pt").exists():
            if resume:
                print(f"{out} holds no last.pt to resume; a new training starts")
            (out / "best.pt").unlink(missing_ok=True)  # from a training that ended before it wrote last.pt
        out.mkdir(parents=True, exist_ok=True)
        write_json(training.full_config(), out / "config.json")
        write_text(sources.report + "\n", out / "data.txt")
        with new_file(out / "split.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "part", "patient"])
            writer.writerows(
                [sources.index.names[n], part, sources.index.patients[n]]
                for part in ("train", "val")
                for n in getattr(sources.split, part)
            )
            writer.writerows([name, PRETRAINED_PART, ""] for name in sources.seen)
        if training.history:  # the interrupted process may not have written it
            write_history(training.history, out / "history.csv")
        self.logs = tensorboard(out, training.epoch)
        if training.epoch == training.extendable["epochs"]:
            print(f"{out}: all {training.epoch} epochs are complete; to continue, use --resume with more --epochs")

    def save_epoch(self, training: Training, row: dict[str, Any], better: bool) -> None:
        """Writes the checkpoints and logs of a completed epoch."""
        # best.pt first: if the process is killed before last.pt is written, a resumed run finds the same best epoch
        if better:
            best = {"config": training.full_config(), "model": training.network.state_dict(), "epoch": training.epoch}
            save_atomically(best, self.out / "best.pt")
        save_atomically(training.state(), self.out / "last.pt")
        write_history(training.history, self.out / "history.csv")
        if self.logs is not None:
            for name, value in row.items():
                self.logs.add_scalar(name, value, training.epoch)
            self.logs.flush()
        shown = f", val AUC {row['val_auc']:.3f}" if "val_auc" in row else ""
        speed = row["images_per_s"]
        print(f"epoch {training.epoch}: loss {row['loss']:.4f}{shown}, {speed:.1f} images/s", flush=True)


def write_history(history: list[dict[str, Any]], path: Path) -> None:
    write_rows(history, path, list(history[0]))


def tensorboard(out: Path, epoch: int) -> Any:
    """A TensorBoard writer for the steps after ``epoch``. None if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=epoch + 1)
