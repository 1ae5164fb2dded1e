"""The user's model: where its traced layers are, and how it is left as it was found.

architectures.py   blocks, and the layers of each that write to the residual stream: of a family in the table
                   (families.py), or found by structure (structure.py)
layers.py          what counts as a linear layer; adapters.py, those of PEFT; quantised.py
parameters.py      those that a ledger records, by the model's own names
patching.py        hooks and methods put on for a while, in one thread, and undone
twin.py            a second tree of modules, for other weights
"""
