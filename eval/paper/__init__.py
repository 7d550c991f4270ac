"""The paper's tables and the comparison with them."""
