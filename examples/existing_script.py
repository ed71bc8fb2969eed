"""Run a script that you do not want to change over a grid of arguments.

`train.py` has an option of its own for its result, so the path is passed by that name. A script that reads
`AIOHYPERTUNITY_OUTPUT_FILE`, or has an option `--output_file`, needs no path from you.

python existing_script.py
"""

import asyncio
import json
import tempfile
from pathlib import Path

import aiohypertunity as ht

SCRIPT = Path(__file__).with_name("train.py")


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        jobs = [
            ht.Job(
                task=SCRIPT,
                args={"lr": lr, "epochs": 5, "out": f"{directory}/{lr}.json"},
                meta={"output": "env"},  # append no --output_file, which the script does not have
                timeout=600,
            )
            for lr in (0.01, 0.1, 0.3)
        ]
        async with ht.Scheduler(n_parallel=2) as scheduler:
            scheduler.dispatch(jobs)
            async for result in scheduler.collect(ordered=True):
                if not result.ok:
                    print(f"{result.job.args}: {result.error}")
                    continue
                found = json.loads(Path(result.job.args["out"]).read_text())
                print(found, "last line:", result.stdout.splitlines()[-1])


if __name__ == "__main__":
    asyncio.run(main())
