"""Checks an installed wheel in a fresh environment, for release.py. Prints one line of JSON, or fails.

Needs the wheel and its dependencies only. Do not run it in a folder that contains a folder sgl_ops.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path

start = time.perf_counter()
import torch  # noqa: E402

middle = time.perf_counter()
import sgl_ops  # noqa: E402

import_ms = (time.perf_counter() - middle) * 1e3

from torch import nn  # noqa: E402

from sgl_ops import SGLLoss, _fused  # noqa: E402


def train(impl: str) -> list[float]:
    """The losses of 20 training steps of a small network. Maps and packed bags alternate."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
    criterion = SGLLoss(pooling="softmax", mask_weight=0.1, class_weight=[1.0, 2.0, 1.0], impl=impl)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    images, labels = torch.randn(4, 1, 12, 12), torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1], [1.0, 1.0, torch.nan]])
    offsets = torch.tensor([0, 64, 128, 192, 256])
    losses = []
    for step in range(20):
        logits = net(images)
        if step % 2:
            loss = criterion(logits.movedim(1, -1).reshape(-1, 3), labels, offsets=offsets)
        else:
            loss = criterion(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    assert "site-packages" in Path(sgl_ops.__file__).parts, sgl_ops.__file__
    assert {file.parts[0].split("-")[0] for file in files("sgl-ops") or []} == {"sgl_ops"}
    assert _fused.DEVICES, _fused.REASON
    assert ("cuda" in _fused.DEVICES) == bool(torch.ops.sgl_ops.cuda_architectures() and torch.version.cuda)

    losses = train("fused")
    assert losses[-1] < losses[0], losses
    torch.testing.assert_close(losses, train("reference"), rtol=1e-4, atol=1e-5)

    logits, labels = torch.randn(3, 2, 40, dtype=torch.bfloat16, requires_grad=True), torch.tensor([[1, 0]] * 3)
    criterion = SGLLoss(impl="fused", check=False)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")  # needs no compiler
    torch.testing.assert_close(compiled(logits, labels), criterion(logits, labels))

    report = subprocess.run([sys.executable, "-m", "sgl_ops"], capture_output=True, text=True)
    assert report.returncode == 0, report.stdout + report.stderr
    (line,) = [line for line in report.stdout.splitlines() if line.startswith("self-test cpu: ")]
    answer = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu_level": torch.ops.sgl_ops.cpu_level(),
        "cuda_architectures": torch.ops.sgl_ops.cuda_architectures(),
        "gpus": torch.cuda.device_count(),
        "error": line.split()[3].rstrip(","),
        "import_torch_ms": round((middle - start) * 1e3),
        "import_sgl_ops_ms": round(import_ms),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
