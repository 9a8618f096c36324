"""Skips the tests of the importing module if a package of the extra for pretrained features is missing."""

import pytest

for needed in ("h5py", "safetensors", "pandas", "PIL", "scipy", "sklearn"):
    pytest.importorskip(needed)
