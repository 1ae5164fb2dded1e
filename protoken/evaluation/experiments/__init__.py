"""One module per experiment, named like it; evaluation/harness.py says what a module must offer.

Its tables and pictures are in `<experiment>_tables` and `<experiment>_plots` (backdoor and scale share tables.py); what
else begins with its name is a part of it.
"""

EXPERIMENTS = {
    "ablation": "Which blocks know, what is the gradient worth, and how close to exact values at what cost?",
    "attacks": "Zero, scaled, split, colluding and evading clients against every method: who can cheat?",
    "backdoor": "Are the clients who planted a backdoor named? Models x domains, after every round.",
    "benign": "Is an ordinary answer attributed to the client whose domain it is, and as Shapley values would?",
    "confidence": "False alarms where nobody taught the answer, and how true stated probabilities are.",
    "history": "Backdoors planted late, or early by who became honest since: are client and round named?",
    "overhead": "Time and accuracy against the number of traced blocks, by way.",
    "scale": "55 clients of which 10 take part in a round: 25 poisoned, and 1 poisoned.",
}
"""Every experiment with its one-line description; nothing is imported for it."""
