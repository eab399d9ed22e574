import numpy as np
import pytest


@pytest.fixture(scope="session")
def folder_of_micrographs(tmp_path_factory):
    """A folder of three small invented micrographs. Each is a sum of waves in two directions."""
    folder = tmp_path_factory.mktemp("micrographs")
    rows, columns = np.indices((64, 96))
    for number in range(3):
        waves = np.sin(rows / (4 + number)) + np.cos(columns / 5)
        np.save(folder / f"truth-{number}.npy", waves.astype(np.float32))
    return folder
