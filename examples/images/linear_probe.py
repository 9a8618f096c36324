"""A linear probe of the features of chest films: how much about the labels they hold. Used by frozen_cxr.py."""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from common.csv_table import write_rows
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from images.frozen import FOLDS, Films, fold_of, read_films
from images.metrics import auc_per_class
from images.nih import CLASSES


def probe(args: argparse.Namespace) -> None:
    """Writes ``args.out``: the AUC of the probe for each partition of the patients and each penalty.

    The probe is a logistic regression with an L2 penalty for each class, on standardized means of the features. Only
    films of the training list are used. A film is predicted by the probe of the fold that does not have its patient.
    """
    films = read_films(args.data_dir, args.tables, None, args.features)
    numbers = np.flatnonzero(~films.test)
    x, patients = means_of_regions(films, numbers, args.regions), films.patients[numbers]
    labels = films.labels[numbers].numpy()
    rows = []
    for c in args.c:
        for partition in args.partitions:
            scores = out_of_fold(x, labels, patients, c, partition)
            value = auc_per_class(scores, labels, CLASSES)["mean"]
            rows.append({"regions": args.regions**2, "c": c, "partition": partition, "auc": round(value, 4)})
            print(f"C {c:g}, partition {partition}: AUC {value:.3f}", flush=True)
    best = max(args.c, key=lambda c: np.mean([row["auc"] for row in rows if row["c"] == c]))
    mean = np.mean([row["auc"] for row in rows if row["c"] == best])
    print(f"best C {best:g}: mean AUC of the partitions {mean:.3f}")
    write_rows(rows, args.out)


def means_of_regions(films: Films, numbers: np.ndarray, regions: int) -> np.ndarray:
    """The means of the features in ``regions`` x ``regions`` equal regions of films, (n, D regions^2)."""
    maps = torch.from_numpy(films.features[numbers].astype(np.float32))
    return F.adaptive_avg_pool2d(maps, regions).flatten(1).numpy()


def out_of_fold(x: np.ndarray, labels: np.ndarray, patients: np.ndarray, c: float, partition: int) -> np.ndarray:
    """Probabilities (n, C) of films with features ``x`` (n, D) and ``labels`` (n, C), by folds over ``patients``."""
    fold = fold_of(patients, partition)
    scores = np.full(labels.shape, np.nan)
    for k in range(FOLDS):
        train, held = fold != k, fold == k
        for kind in range(labels.shape[1]):
            y = labels[train, kind]
            if len(np.unique(y)) < 2:
                scores[held, kind] = 0.5  # the class is not in the training part
                continue
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
            scores[held, kind] = model.fit(x[train], y).predict_proba(x[held])[:, 1]
    return scores
