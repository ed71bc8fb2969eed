"""An existing training script, as `existing_script.py` runs it: it knows nothing of aiohypertunity."""

import argparse
import json

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--out", required=True)
given = parser.parse_args()

loss = 1.0
for epoch in range(given.epochs):
    loss *= 1 - given.lr
    print(f"epoch {epoch}: loss {loss:.4f}")

with open(given.out, "w") as file:
    json.dump({"lr": given.lr, "loss": loss}, file)
