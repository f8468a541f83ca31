"""gigagan_jax.train as it is, beside a note of each batch's examples: FILE, then train's own arguments.

Each line of FILE: [position after the batch, rows of this process, their indices in the source].
"""

import json
import sys

from gigagan_jax import cli, train
from gigagan_jax.data.pipeline import Pipeline

# Removed here, so that train sees its own arguments only.
file = sys.argv.pop(1)
read = Pipeline.__next__


def read_and_note(self):
    batch = read(self)
    with open(file, "a") as out:
        out.write(json.dumps([self._examples_seen, list(self._rows), batch["index"].tolist()]) + "\n")
    return batch


# The class and not an instance: the loop builds its pipeline itself.
Pipeline.__next__ = read_and_note

if __name__ == "__main__":
    cli.main(train.verb)
