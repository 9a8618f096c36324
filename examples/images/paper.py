"""Tables 1 and 2 of Seibold et al. (ACCV 2020), on the official test list of ChestX-ray14.

"*" marks methods that used bounding boxes in training. Values are as printed, with one exception: Table 2 prints 0.1
for SGL, Effusion, T_IoU 0.7. This contradicts the printed mean. The value 0.01 agrees with it and is used here. The
printed mean of Liu et al. at T_IoU 0.1 (0.60) differs from the mean of its row (0.57).
"""

from __future__ import annotations

from collections.abc import Sequence

from images.nih import BOXED, CLASSES


def _row(classes: Sequence[str], values: str) -> dict[str, float]:
    return dict(zip((*classes, "mean"), map(float, values.split()), strict=True))


#: Table 1, AUC: {method: {class: value, ..., "mean": value}}, classes in the order of CLASSES.
AUC = {
    method: _row(CLASSES, values)
    for method, values in {
        "Wang et al. 2017": "0.70 0.81 0.70 0.81 0.76 0.83 0.79 0.87 0.66 0.69 0.67 0.68 0.66 0.80 0.75",
        "Li et al. 2018 *": "0.80 0.87 0.80 0.88 0.87 0.91 0.78 0.70 0.70 0.83 0.75 0.79 0.67 0.87 0.81",
        "Liu et al. 2019 *": "0.79 0.87 0.79 0.91 0.88 0.93 0.80 0.92 0.69 0.81 0.73 0.80 0.75 0.89 0.83",
        "ResNet-50 + SGL (paper)": "0.78 0.88 0.75 0.86 0.84 0.95 0.85 0.94 0.71 0.84 0.81 0.81 0.74 0.90 0.83",
    }.items()
}
#: Table 2, localization accuracy with the class predicted at 0.5, classes in the order of BOXED:
#: {method: {T_IoU: {class: value, ..., "mean": value}}}.
LOCALIZATION = {
    method: {t: _row(BOXED, values) for t, values in rows.items()}
    for method, rows in {
        "Wang et al. 2017": {
            "0.1": "0.69 0.94 0.66 0.71 0.40 0.14 0.63 0.38 0.57",
            "0.3": "0.24 0.46 0.30 0.28 0.15 0.04 0.17 0.13 0.22",
            "0.5": "0.05 0.18 0.11 0.07 0.01 0.01 0.01 0.03 0.06",
            "0.7": "0.01 0.03 0.02 0.00 0.00 0.00 0.01 0.02 0.01",
        },
        "Li et al. 2018 *": {
            "0.1": "0.71 0.98 0.87 0.92 0.71 0.40 0.60 0.63 0.73",
            "0.3": "0.36 0.94 0.56 0.66 0.45 0.17 0.39 0.44 0.50",
            "0.5": "0.14 0.84 0.22 0.30 0.22 0.07 0.17 0.19 0.27",
            "0.7": "0.04 0.52 0.07 0.09 0.11 0.01 0.05 0.05 0.12",
        },
        "Liu et al. 2019": {
            "0.1": "0.39 0.90 0.65 0.85 0.69 0.38 0.30 0.39 0.60",
            "0.3": "0.34 0.71 0.39 0.65 0.48 0.09 0.16 0.20 0.38",
            "0.5": "0.19 0.53 0.19 0.47 0.33 0.03 0.08 0.11 0.24",
            "0.7": "0.08 0.30 0.09 0.25 0.19 0.01 0.04 0.07 0.13",
        },
        "SGL (paper)": {
            "0.1": "0.67 0.94 0.67 0.81 0.71 0.41 0.66 0.43 0.66",
            "0.3": "0.31 0.76 0.30 0.43 0.34 0.13 0.39 0.18 0.36",
            "0.5": "0.07 0.32 0.08 0.19 0.18 0.10 0.12 0.04 0.13",
            "0.7": "0.02 0.01 0.01 0.00 0.04 0.00 0.03 0.01 0.01",
        },
    }.items()
}
NOTE = (
    "Rows with a year or (paper) are those of Tables 1 and 2 of Seibold et al., ACCV 2020. *: used bounding boxes in "
    "training. Table 2 prints 0.1 for SGL, Effusion, at 0.7. The printed mean requires 0.01, which is shown here."
)
