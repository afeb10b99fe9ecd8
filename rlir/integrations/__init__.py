"""The ops where other trainers call theirs: TRL, verl, OpenRLHF and torchrl.

A module a project. None of them needs the project it is for, but ``rlir.integrations.trl``, whose
trainer is TRL's own.
"""
