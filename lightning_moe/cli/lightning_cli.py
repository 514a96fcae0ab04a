"""bare"""
from lightning.pytorch.cli import LightningCLI
import lightning_moe.strategy
class C(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--report", type=bool, default=False, help="x")
def run(argv):
    cli = C(args=list(argv), save_config_kwargs={"overwrite": True})
