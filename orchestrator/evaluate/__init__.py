"""The command `evaluate`: the papers' protocols on a frozen backbone, after the training.

`suite.py` says what a protocol is here, `driver.py` what the command does.
"""
