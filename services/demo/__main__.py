"""`python -m services.demo [DATA]`: the whole workflow on real images.

It uses real servers, and the public client only.
"""

import argparse
import sys
import time
from pathlib import Path

from defuse import Client, DefuseError
from rich.console import Console

from services.demo import classifier, main_job
from services.demo.main_job import Display
from services.localstack.stack import LocalStack, StackSettings


def main() -> None:
    """Run the demo.

    Exits with status 1 and a one-line error message when something is missing or refused.
    """
    arguments = _arguments()
    display = Display(Console())
    try:
        _run(arguments, display)
    except (DefuseError, RuntimeError) as error:
        sys.exit(f"demo: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.demo", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="class folders or an .npz; by default 5,000 MNIST digits")
    parser.add_argument("--report", type=Path, default=Path("demo-report"), help="directory of the report")
    parser.add_argument("--gateway", help="HOST:PORT of a stack that runs already; by default one is started")
    return parser.parse_args()


def _run(arguments: argparse.Namespace, display: Display) -> None:
    settings = StackSettings()
    cache = settings.cache.expanduser() / "demo"
    cache.mkdir(parents=True, exist_ok=True)
    images = classifier.read(arguments.data or classifier.digits(cache), seed=main_job.SEED)
    # A unique name for each demo: the stack's data stay, so that the VAE is trained only once.
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    begin = time.monotonic()
    if arguments.gateway:
        outcome = _tell(arguments.gateway, images, name, cache, arguments.report, display)
    else:
        display.say("starting Redis, Triton and the services")
        own = settings.model_copy(update={"home": cache / "stack"})
        with LocalStack(own, display.say) as stack:
            outcome = _tell(stack.gateway, images, name, cache, arguments.report, display)
    if outcome.correction:
        display.figures(main_job.figures(outcome.correction))
    else:
        display.say("no region was found: there is nothing to correct")
    display.say(f"finished in {time.monotonic() - begin:.0f} s; report: {outcome.report.resolve()}")


def _tell(
    gateway: str, images: classifier.DemoData, name: str, cache: Path, report: Path, display: Display
) -> main_job.DemoOutcome:
    with Client(gateway) as client:
        return main_job.run_main_job(client, images, name=name, cache=cache, report=report, display=display)


if __name__ == "__main__":
    main()
