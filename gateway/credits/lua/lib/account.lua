-- The account hash: loaded once, changed in memory, written once at the end (read → check → write).
--
-- plan, plan_version      the plan's name; a number that only grows with each change of plan
-- refresh, window_end     length and end of the current window, ms (a plan without an allowance: days of 0 credits)
-- granted, used, held     the current window's allowance, nano
-- used_today              allowance used today in windows before the current one, nano: a change to a longer
--                         refresh cycle counts it, so that changing back and forth resets nothing
-- held_before             allowance still held by reservations of earlier windows, nano
-- balance, balance_held   prepaid credits, nano
-- epoch                   number of windows this account has seen; a reservation belongs to one
-- sequence                number of the last ledger entry
-- seen                    latest time seen, ms: time never runs backwards for an account
-- total_*                 lifetime sums, nano; only ever touched by HINCRBY, never by Lua's doubles

local NUMBERS = {
  'plan_version', 'refresh', 'window_end', 'granted', 'used', 'used_today', 'held', 'held_before',
  'balance', 'balance_held', 'epoch', 'sequence', 'seen'
}

local function load_account(key)
  local values = redis.call('HMGET', key, 'plan', unpack(NUMBERS))
  if not values[1] then return nil end
  local account = {key = key, plan = values[1], stored_plan = values[1], stored = {}, totals = {}}
  for i, name in ipairs(NUMBERS) do
    account[name] = tonumber(values[i + 1])
    account.stored[name] = account[name]
  end
  return account
end

local function new_account(key, plan)
  local account = {key = key, plan = plan, stored = {}, totals = {}}
  for _, name in ipairs(NUMBERS) do account[name] = 0 end
  return account
end

-- Write what changed. total_* are added with 64-bit arithmetic by the server itself.
local function save_account(account)
  local changed = {}
  if account.plan ~= account.stored_plan then changed = {'plan', account.plan} end
  for _, name in ipairs(NUMBERS) do
    if account[name] ~= account.stored[name] then
      changed[#changed + 1] = name
      changed[#changed + 1] = digits(account[name])
    end
  end
  if #changed > 0 then redis.call('HSET', account.key, unpack(changed)) end
  for name, delta in pairs(account.totals) do
    if delta ~= 0 then redis.call('HINCRBY', account.key, 'total_' .. name, digits(delta)) end
  end
end

local function add_total(account, name, delta)
  account.totals[name] = (account.totals[name] or 0) + delta
end

-- The store's time in ms, and the account's: never earlier than the latest time it has seen.
local function store_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function account_ms(account)
  return math.max(store_ms(), account.seen)
end

-- Five ARGV from index i: kind, amount (nano), refresh (ms), rate (ppm), payg ('1' or '0').
local function read_terms(i)
  local terms = {
    kind = ARGV[i],
    amount = whole(ARGV[i + 1], 'allowance amount'),
    refresh = whole(ARGV[i + 2], 'refresh'),
    rate = whole(ARGV[i + 3], 'rate'),
    payg = ARGV[i + 4] == '1'
  }
  if terms.refresh < 1 or DAY_MS % terms.refresh ~= 0 then
    error('refresh does not divide a day: ' .. ARGV[i + 2])
  end
  return terms
end

-- Move the account into the window of now if its own has ended. In memory only; the ledger entry is kept in
-- account.refreshed until save time, because a denial writes nothing.
local function roll(account, terms, now)
  if now < account.window_end then return end
  local start, finish, grant = window_at(terms, now)
  local today = now - now % DAY_MS
  local earlier = account.window_end > today and account.used_today + account.used or 0
  -- A cycle made longer in the configuration can open a window that began before the old one ended.
  local carried = start < account.window_end and earlier or 0
  local lapsed = account.granted - account.used - account.held
  account.refreshed = {granted = grant - carried, lapsed = lapsed}
  account.held_before = account.held_before + account.held
  account.held = 0
  account.used = carried
  account.used_today = earlier - carried
  account.granted = grant
  account.refresh = terms.refresh
  account.window_end = finish
  account.epoch = account.epoch + 1
  add_total(account, 'granted', grant - carried)
  add_total(account, 'lapsed', lapsed)
end

-- The gateway's clock and the store's differ by more than a minute: one of them is wrong, and a wrong store
-- clock (a failed-over replica, say) must not be allowed to refresh anyone's allowance.
local MAX_SKEW_MS = 60000
local function skewed(account, now, gateway_ms)
  return now >= account.window_end and math.abs(store_ms() - gateway_ms) > MAX_SKEW_MS
end

-- Only a time within the window is remembered: a wrong clock must not push an account into the future.
local function remember_time(account, now)
  if now < account.window_end then account.seen = now end
end

local function allowance_free(account)
  return math.max(0, account.granted - account.used - account.held)
end

local function balance_free(account)
  return account.balance - account.balance_held
end

-- The ten values that every reply ends with; domain/decision.py Funds reads them.
local function funds(account, terms, now, reply)
  local _, _, next_grant = window_at(terms, math.max(now, account.window_end))
  for _, value in ipairs({account.plan, digits(account.granted), digits(account.used), digits(account.held),
    digits(account.balance), digits(account.balance_held), digits(account.window_end), digits(next_grant),
    digits(now), digits(account.sequence)}) do
    reply[#reply + 1] = value
  end
  return reply
end
