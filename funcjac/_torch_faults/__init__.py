"""Operations that PyTorch differentiates wrongly, in one table, and their replacements."""
