"""The download stage and the process that runs img2dataset."""
