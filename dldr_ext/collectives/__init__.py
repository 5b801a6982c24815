"""What ranks do together: process groups, consistency checks, transactions, partitions."""
