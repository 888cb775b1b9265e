"""What makes good for INT4's error in the running model: tables, low rank, bias."""
