"""Who may attend to whom: lazy masks, their algebra, and the plans they yield."""
