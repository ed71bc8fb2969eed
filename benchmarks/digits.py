"""How well a classifier tells handwritten digits apart: what the demo tunes.

The same objective three ways: `accuracy` as a function, `digits.py:accuracy` as a function in a script, and
`python digits.py C GAMMA OUTPUT` as a script that writes its result to a file.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import sys
from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC


def accuracy(c: float, gamma: float) -> float:
    """The share of digits that a support vector machine recognizes, cross-validated."""
    images, labels = load_digits(return_X_y=True)
    model = SVC(C=c, gamma=gamma)
    return float(cross_val_score(model, images / 16, labels, cv=3).mean())


if __name__ == "__main__":
    c, gamma, output = sys.argv[1:]
    Path(output).write_text(json.dumps(accuracy(float(c), float(gamma))))
