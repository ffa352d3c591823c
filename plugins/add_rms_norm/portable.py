ADD_RMS_NORM = """
AddRMSNorm <epsilon> (x, update, weight) => (sum, y) {
  sum = ResidualAdd (x, update)
  y = RMSNorm <epsilon: float = @epsilon> (sum, weight)
}
"""
