"""What clients reveal: defences, their accounting, the observer, and attacks."""
