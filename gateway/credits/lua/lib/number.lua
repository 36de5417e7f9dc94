-- Numbers that are money. Lua has only doubles: exact to 2^53, printed wrongly by tostring() from 1e14.

local MAX_NANO = 4503599627370495 -- 2^52 - 1: one bit of room for adding two amounts
local PPM = 1000000

-- A whole number ≥ 0 from its decimal digits. Arithmetic alone would take 0x10, 1e3, nan and inf.
-- (text + 0 costs half of tonumber(text), which reads the text twice.)
local function whole(text, name)
  if not string.find(text, '^%d+$') then error(name .. ' is not a whole number: ' .. text) end
  local value = text + 0
  if value > MAX_NANO then error(name .. ' is too large: ' .. text) end
  return value
end

-- '%d' costs a third of '%.0f', and writes the same where the server counts with 64 bits.
assert(string.format('%d', MAX_NANO) == '4503599627370495', 'a server of 32 bits cannot keep credits')
local function digits(value)
  return string.format('%d', value)
end

-- ceil(nano * ppm / 1e6) without leaving the exact range: the product is taken in two parts.
local function at_rate(nano, ppm)
  local high = math.floor(nano / PPM)
  return high * ppm + math.ceil((nano - high * PPM) * ppm / PPM)
end

-- floor(nano * 1e6 / ppm), at most limit: the list-price cost that nano of allowance pays at rate ppm.
local function covered_by(nano, ppm, limit)
  local high = math.floor(nano / ppm)
  return math.min(limit, high * PPM + math.floor((nano - high * ppm) * PPM / ppm))
end
