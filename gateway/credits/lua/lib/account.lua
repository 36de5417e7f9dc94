-- The account hash: loaded once, changed in memory, written once at the end (read → check → write).
--
-- plan, plan_version      the plan's name; a number that only grows with each change of plan
-- balance, balance_held   prepaid credits, nano
-- day, day_used           start (ms, UTC) of the day of the latest refresh; allowance used in it, nano: a window that a
--                         change of plan opens counts what was used before it, so that changing back resets nothing
-- epoch                   number of windows that this account has opened; each window has a number of its own
-- sequence                number of the last ledger entry
-- seen                    latest time seen, ms: time never runs backwards for an account
-- w1 … w4                 the plan's windows, each 'refresh|finish|granted|used|…' (WINDOW below)
-- total_*                 lifetime sums, nano; only ever touched by HINCRBY, never by Lua's doubles

local NUMBERS = {'plan_version', 'balance', 'balance_held', 'day', 'day_used', 'epoch', 'sequence', 'seen'}

-- refresh, finish         length and end of the window, ms
-- granted, used, held     nano; held by reservations that were made in this window
-- before                  nano that open reservations of ended windows of this length still hold
-- epoch                   this window's number
-- first                   number of the first window of this length since the plan has it
-- adopted                 nano held in the window that this one replaced at a change of plan, and by what that adopted
-- adopted_epochs          the numbers of those windows, with commas between: the last of a window's fields
local WINDOW = {'refresh', 'finish', 'granted', 'used', 'held', 'before', 'epoch', 'first', 'adopted'}
local WINDOW_FIELDS = {'w1', 'w2', 'w3', 'w4'}

local function read_window(text)
  local window, i = {adopted_epochs = {}}, 0
  for part in string.gmatch(text, '%d+') do
    i = i + 1
    if WINDOW[i] then
      window[WINDOW[i]] = tonumber(part)
    else
      window.adopted_epochs[i - #WINDOW] = tonumber(part)
    end
  end
  return window
end

local function window_text(window)
  local parts, epochs = {}, {}
  for i, name in ipairs(WINDOW) do parts[i] = digits(window[name]) end
  for i, epoch in ipairs(window.adopted_epochs) do epochs[i] = digits(epoch) end
  return table.concat(parts, '|') .. '|' .. table.concat(epochs, ',')
end

local function new_account(key, plan)
  local account = {key = key, plan = plan, stored = {}, windows = {}, totals = {}, entries = {}}
  for _, name in ipairs(NUMBERS) do account[name] = 0 end
  return account
end

local function load_account(key)
  local values = redis.call('HMGET', key, 'plan', 'w1', 'w2', 'w3', 'w4', unpack(NUMBERS))
  if not values[1] then return nil end
  local account = new_account(key, values[1])
  account.stored.plan = values[1]
  for i, field in ipairs(WINDOW_FIELDS) do
    if values[i + 1] then
      account.windows[i] = read_window(values[i + 1])
      account.stored[field] = values[i + 1]
    end
  end
  for i, name in ipairs(NUMBERS) do
    account[name] = tonumber(values[i + 5])
    account.stored[name] = values[i + 5]
  end
  return account
end

-- Write what changed, the ledger entries first. total_* are added with 64-bit arithmetic by the server itself.
local function save_account(account, ledger, name, now)
  append_entries(account, ledger, name, now)
  local changed = {}
  local function put(field, text)
    if text ~= account.stored[field] then
      changed[#changed + 1] = field
      changed[#changed + 1] = text
    end
  end
  put('plan', account.plan)
  for _, number in ipairs(NUMBERS) do put(number, digits(account[number])) end
  for i, field in ipairs(WINDOW_FIELDS) do
    local window = account.windows[i]
    if window then
      put(field, window_text(window))
    elseif account.stored[field] then
      redis.call('HDEL', account.key, field)
    end
  end
  if #changed > 0 then redis.call('HSET', account.key, unpack(changed)) end
  for total, delta in pairs(account.totals) do
    if delta ~= 0 then redis.call('HINCRBY', account.key, 'total_' .. total, digits(delta)) end
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

-- When the first of the account's windows ends, ms; without windows, the day's end.
local function first_finish(account)
  local finish = account.day + DAY_MS
  for _, window in ipairs(account.windows) do finish = math.min(finish, window.finish) end
  return finish
end

-- Only a time within the windows is remembered: a wrong clock must not push an account into the future.
local function remember_time(account, now)
  if now < first_finish(account) then account.seen = now end
end

-- The gateway's clock and the store's differ by more than a minute: one of them is wrong, and a wrong store
-- clock (a failed-over replica, say) must not be allowed to refresh anyone's allowance.
local MAX_SKEW_MS = 60000
local function clocks_differ(gateway_ms)
  return math.abs(store_ms() - gateway_ms) > MAX_SKEW_MS
end

local function skewed(account, now, gateway_ms)
  return #account.windows > 0 and now >= first_finish(account) and clocks_differ(gateway_ms)
end

local function window_free(window)
  return window.granted - window.used - window.held - window.adopted
end

-- What the allowance can still pay: the tightest window decides.
local function allowance_free(account)
  local free
  for _, window in ipairs(account.windows) do free = math.min(free or MAX_NANO, window_free(window)) end
  return math.max(0, free or 0)
end

local function balance_free(account)
  return account.balance - account.balance_held
end

-- What reservations in flight hold of what the plan may use now: of windows, the most that one holds.
local function held_in_flight(account, terms)
  local held = terms.payg and account.balance_held or 0
  local most = 0
  for _, window in ipairs(account.windows) do most = math.max(most, window.held + window.adopted) end
  return held + most
end

-- The values that every reply ends with; domain/decision.py Funds reads them.
local function funds(account, terms, now, reply)
  local values = {account.plan, digits(account.balance), digits(account.balance_held), digits(now),
    digits(account.sequence)}
  for _, window in ipairs(account.windows) do
    local next_granted = 0
    for _, term in ipairs(terms.windows) do
      if term.refresh == window.refresh then
        local _, _, grant = window_at(term, math.max(now, window.finish))
        next_granted = grant
      end
    end
    for _, number in ipairs({window.refresh, window.granted, window.used, window.held + window.adopted, window.finish,
      next_granted}) do
      values[#values + 1] = digits(number)
    end
  end
  for _, value in ipairs(values) do reply[#reply + 1] = value end
  return reply
end
