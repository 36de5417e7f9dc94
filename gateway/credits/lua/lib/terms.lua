-- A plan's terms, as one argument: the store spends 0.2 µs on an argument before the script sees it.
--
-- rate (ppm)|payg (1 or 0)|on_lost|lengths|windows
-- lengths: ',refresh' (ms) for each window; windows: 'kind,amount (nano),refresh (ms)' with semicolons between. They are
-- read where they are needed: when windows change, and the account's are of other lengths or have ended.

local function read_terms(text)
  local rate, payg, on_lost = string.match(text, '^([^|]*)|([01])|([^|]*)|')
  return {rate = whole(rate, 'rate'), payg = payg == '1', on_lost = on_lost}
end

local function read_windows(terms)
  local windows = {}
  for kind, amount, refresh in string.gmatch(string.match(terms, '[^|]*$'), '([^,;]*),([^,;]*),([^,;]*)') do
    local term = {kind = kind, amount = whole(amount, 'allowance amount'), refresh = whole(refresh, 'refresh')}
    if term.refresh < 1 or DAY_MS % term.refresh ~= 0 then error('refresh does not divide a day: ' .. refresh) end
    windows[#windows + 1] = term
  end
  return windows
end

local function same_length(windows, refresh)
  for _, window in ipairs(windows) do
    if window.refresh == refresh then return window end
  end
end
