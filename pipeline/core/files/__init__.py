"""How files are read, checked and written: the boundary to what others wrote, durability, locks, damage."""
