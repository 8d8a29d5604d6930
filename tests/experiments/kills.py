"""Kill runs at random moments, or stop them by Ctrl-C, resume each, and compare the end with an undisturbed run's.

python tests/experiments/kills.py --data_dir sample_data --kills 10
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[place]) for place in (1, 2)]

import conftest  # noqa: E402
import test_resume  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("sample_data"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, names, wanted, different = random.Random(args.seed), list(test_resume.RUNS), {}, 0
    print("| run | resumed | end |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        conftest.write_tiny_weights(Path(folder) / "tiny.pth")
        for number in range(args.kills):
            name, out, log = names[number % len(names)], Path(folder, str(number), "stopped"), io.StringIO()
            with contextlib.redirect_stdout(log):
                if name not in wanted:
                    test_resume.run(name, args.data_dir, Path(folder, name, "undisturbed"))
                    wanted[name] = conftest.outcome(Path(folder, name, "undisturbed"))
                log.truncate(0)
                test_resume.stop_and_resume(name, args.data_dir, out, chance)
            said = [line for line in log.getvalue().splitlines() if "resumed after" in line or "done before" in line]
            same = conftest.outcome(out) == wanted[name]
            different += not same
            print(f"| {name} | {'; '.join(said) or 'from the beginning'} | {'the same bits' if same else 'ANOTHER'} |")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
