"""Makes the trajectories that the cold start learns from: a teacher or gold decompositions, rejection, a journal."""
