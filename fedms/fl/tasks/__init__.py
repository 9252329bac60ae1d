"""What an example is and how an answer is judged: a file for each kind of task."""

from fedms.fl.tasks.causal_lm import BITS
from fedms.fl.tasks.classify import ACCURACY

METRICS = {"text": ACCURACY, "images": ACCURACY, "causal_lm": BITS}
"""How the scores of a run are shown, by ``task.kind``."""
