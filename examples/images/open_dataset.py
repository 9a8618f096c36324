"""Opens a data set with the options of a command. Its kind is an option, or is recognized from its tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from images import chexpert, folder, nih
from images.dataset import Index


def kind_of(tables: Path) -> str:
    """``"nih"``, ``"chexpert"`` or ``"folder"``, recognized from the tables in the folder.

    Raises:
        ValueError: the folder has the tables of no kind, or of several kinds.
    """
    tables = Path(tables)
    shown = {
        "nih": any((tables / name).is_file() for name in nih.ENTRIES),
        "chexpert": all((tables / name).is_file() for name in chexpert.TABLES),
        "folder": (tables / folder.LABELS).is_file(),
    }
    kinds = [kind for kind, is_present in shown.items() if is_present]
    if len(kinds) > 1:
        raise ValueError(f"{tables}: found the tables of {' and of '.join(kinds)}; choose one with --dataset")
    if not kinds:
        if not tables.is_dir():
            raise ValueError(f"{tables}: no such folder")
        raise ValueError(
            f"{tables}: expected {nih.ENTRIES[0]} or {nih.ENTRIES[1]} (nih), {' and '.join(chexpert.TABLES)} "
            f"(chexpert), or {folder.LABELS} (folder), found none; give their folder with --tables"
        )
    return kinds[0]


def open_dataset(args: argparse.Namespace, allow_missing: bool = False) -> Index:
    """The data set of ``--data-dir``, ``--tables``, ``--dataset``, ``--view``, ``--uncertain`` and ``--fit``.

    Raises:
        ValueError: the data set cannot be used, or an option does not apply to its kind.
    """
    place = (args.data_dir, allow_missing, args.tables)
    kind = args.dataset or kind_of(args.tables or args.data_dir)
    views = {"nih": nih.VIEWS, "chexpert": chexpert.VIEWS}.get(kind, ())
    if args.view is not None and args.view not in views:
        raise ValueError(f"view: expected {', '.join(views) or 'none'} with a data set {kind}, got {args.view}")
    if args.uncertain is not None and kind != "chexpert":
        raise ValueError(f"uncertain: expected a data set chexpert, got {kind}")
    if kind == "nih":
        if args.fit is not None:
            raise ValueError(f"fit: expected none with a data set nih, whose images must be square, got {args.fit}")
        return nih.load_index(*place, view=args.view)
    if kind == "chexpert":
        return chexpert.load_chexpert(
            *place, view=args.view, uncertain=args.uncertain or "unknown", fit=args.fit or "pad"
        )
    return folder.load_folder(*place, fit=args.fit or "pad", seed=args.split_seed)
