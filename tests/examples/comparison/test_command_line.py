import pytest

from examples.cifar10_supersampling.command_line import CommandLine as Supersampling
from examples.partial_stem.command_line import CommandLine as PartialSTEM


@pytest.mark.parametrize("command_line", [Supersampling, PartialSTEM])
def test_a_training_uses_one_device_unless_others_are_asked_for(command_line):
    def devices(*arguments):
        cli = command_line(
            args=["--trainer.accelerator=cpu", "--trainer.logger=false", *arguments],
            run=False,
            save_config_callback=None,
        )
        return cli.config.trainer.devices

    assert devices() == 1
    assert devices("--trainer.devices=auto") == "auto"
