"""Closed-form repair of a pruned student: the basis of the residual stream, refits, merged heads and experts."""
