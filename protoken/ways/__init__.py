"""From recorded hidden states to gradients and scores: the local, the reverse and the forward way.

capture.py      hidden states recorded while the model generates
replay.py       the traced blocks run again; sites.py, what is watched in them
objective.py    f_t, and what of it the head passes back
relevance.py    gradients at the traced layers, the local way's and the reverse way's
projection.py   those gradients on every client's updates
pullback.py     the reverse way block by block
forward.py      the forward way; its tangents by rule in dual.py, dual_rules.py, dual_attention.py,
                else by autograd in forward_autograd.py
"""
