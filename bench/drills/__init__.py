"""Long runs that kill, overload or cut off real processes and compare what is left."""
