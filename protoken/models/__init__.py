"""The user's model: where its traced layers are, and how it is left as it was found.

architectures.py   families, blocks, the two traced layers of a block
layers.py          what counts as a linear layer; adapters.py, those of PEFT; quantised.py
patching.py        hooks and methods put on for a while, in one thread, and undone
twin.py            a second tree of modules, for other weights
"""
