import subprocess
import sys
from pathlib import Path

import numpy as np

from services.onnx_graph.onnx_files import onnx_function
from tests.conftest import ROOT

EXPORT = """
import sys
from pathlib import Path
from services.demo import classifier

network = classifier.DemoClassifier((12, 16, 3), classes=4).eval()
Path(sys.argv[1]).write_bytes(classifier.to_onnx(network, (12, 16, 3)))
"""


def test_the_export_says_nothing(tmp_path: Path) -> None:
    """The exporter writes nothing between the lines of the demo, and its file takes any number of images."""
    file = tmp_path / "classifier.onnx"
    command = [sys.executable, "-c", EXPORT, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    run = onnx_function(file.read_bytes())
    images = np.random.default_rng(0).random((5, 3, 12, 16), np.float32)
    [logits] = run(images)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(run(images[:1])[0], logits[:1], rtol=1e-4, atol=1e-5)
