"""Pure RL maths: advantages of one trajectory row, and masked token losses."""
