"""Mutation testing: single lines of the packages are changed, one at a time, and the nearest tests have to notice.

    python -m tests.mutation                    # the whole list, and a summary; not part of the default suite
    python -m tests.mutation --only gamma       # the changes whose name or file holds that text
    python -m tests.mutation --jobs 2
    python -m tests.mutation --results docs/measurements/results/mutations.csv --page docs/measurements/mutations.md   # in parts

A change is made in a scratch copy, never in the checkout. What survives is either a hole in the tests or an equivalent: a change after
which nothing can be told apart, which the list says with its reason. The list is in the `of_*.py` files beside this one.
"""
