"""The paper's tables and figures, for any run, model and questions."""
