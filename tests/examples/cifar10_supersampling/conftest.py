import pytest

from examples.cifar10_supersampling import datamodule


@pytest.fixture(scope="module")
def few_images():
    """Photographs cut into few images, so that epochs and tests are short."""
    datamodule.load_images.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "TRAIN_IMAGES", 100)
        patch.setattr(datamodule, "TEST_IMAGES", 20)
        yield
    datamodule.load_images.cache_clear()
