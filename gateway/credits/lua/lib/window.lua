-- Windows of an allowance: aligned to UTC, never across midnight, computed from the store's clock.
-- terms: {kind = 'per_window' | 'monthly', amount (nano), refresh (ms, divides a day)}

local DAY_MS = 86400000

-- Day of the month (1…31) and length of that month, of a day counted from 1970-01-01.
-- Years are counted from 1 March, so that the leap day comes last
-- (howardhinnant.github.io/date_algorithms.html, civil_from_days).
local function day_of_month(days)
  local shifted = days + 719468
  local era = math.floor(shifted / 146097)
  local day_of_era = shifted - era * 146097
  local year_of_era = math.floor((day_of_era - math.floor(day_of_era / 1460) + math.floor(day_of_era / 36524)
    - math.floor(day_of_era / 146096)) / 365)
  local day_of_year = day_of_era - (365 * year_of_era + math.floor(year_of_era / 4) - math.floor(year_of_era / 100))
  local march_month = math.floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - math.floor((153 * march_month + 2) / 5) + 1
  local month = march_month < 10 and march_month + 3 or march_month - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  local month_days = ({31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31})[month]
  local leap = year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0)
  return day, month_days + ((month == 2 and leap) and 1 or 0)
end

-- Start (ms), end (ms) and grant (nano) of the window that contains now.
local function window_at(terms, now)
  local start = now - now % terms.refresh
  if terms.kind == 'per_window' then return start, start + terms.refresh, terms.amount end
  local day, month_days = day_of_month(math.floor(start / DAY_MS))
  local per_day = DAY_MS / terms.refresh
  local windows = month_days * per_day
  local index = (day - 1) * per_day + (start % DAY_MS) / terms.refresh
  local each = math.floor(terms.amount / windows)
  local rest = terms.amount - each * windows
  -- The rest is dealt out cumulatively, so that the month's windows sum to the amount exactly.
  local grant = each + math.floor(rest * (index + 1) / windows) - math.floor(rest * index / windows)
  return start, start + terms.refresh, grant
end
