"""Plans: pure data made of headers, rules and names."""
