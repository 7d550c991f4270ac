"""DeepSpeed's launcher, `python -m deepspeed.launcher.launch`, in half of the time to start."""

from pipeline.core.processes import importing

with importing():
    from deepspeed.launcher.launch import main

if __name__ == "__main__":
    main()
