import numpy as np
import pytest


@pytest.fixture(scope="session")
def micrographs_of(tmp_path_factory):
    """A folder of three small micrographs, waves of several directions."""
    folder = tmp_path_factory.mktemp("micrographs")
    rows, columns = np.indices((64, 96))
    for number in range(3):
        waves = np.sin(rows / (4 + number)) + np.cos(columns / 5)
        np.save(folder / f"truth-{number}.npy", waves.astype(np.float32))
    return folder
