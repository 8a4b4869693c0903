"""`python -m jobs` is `stillhouse`, for places where scripts are not on the path, such as a submitted job."""

from jobs.cli.main import main

main()
