"""Trains an embedded pair from its recipe; a front end to `dynatree.embedded.train`."""

from dynatree.errors import reporting
from dynatree.files import require_writable
from dynatree.jobs import job_parser, running
from dynatree.progress import Progress, training
from dynatree.recipes import parse_recipe


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--recipe", required=True, help="the recipe as JSON")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    recipe = parse_recipe(arguments.recipe)
    require_writable(arguments.out / "training.json")
    what = f"train {arguments.out.name}"
    with running(arguments.device, arguments.threads, what, arguments.busy):
        # Only now: what loads models also looks for GPUs.
        from dynatree.embedded.train import train_pair
        from dynatree.pairs import resolve_device

        device = resolve_device(arguments.device)
        with Progress(arguments.out.name, "steps") as shown:
            train_pair(recipe, arguments.out, device, shown.say, training(shown, recipe))


if __name__ == "__main__":
    reporting(main)
