"""Pure functions of d-vectors and d x d matrices: BFGS, line searches, transfer of curvature."""
