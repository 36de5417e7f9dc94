-- The account hash: loaded once, changed in memory, written once at the end (read → check → write).
--
-- plan, plan_version      the plan's name; a number that only grows with each change of plan
-- balance, balance_held   prepaid credits, nano
-- day_used                allowance used in the day (UTC) of the latest time seen, nano: a window that a change of plan
--                         opens counts what was used before it, so that changing back resets nothing
-- epoch                   number of windows that this account has opened; each window has a number of its own
-- sequence                number of the last ledger entry
-- seen                    latest time seen, ms: time never runs backwards for an account
-- w1 … w4                 the plan's windows, each 'refresh|finish|granted|used|…' (WINDOW below)
-- total_*                 lifetime sums, nano; only ever touched by HINCRBY, never by Lua's doubles
--
-- A number that was never anything but 0 is not stored. In memory there is day, too: the start of that day, ms.

local NUMBERS = {'plan_version', 'balance', 'balance_held', 'day_used', 'epoch', 'sequence', 'seen'}

-- refresh, finish         length and end of the window, ms
-- granted, used, held     nano; held by reservations that were made in this window
-- before                  nano that open reservations of ended windows of this length still hold
-- epoch                   this window's number
-- first                   number of the first window of this length since the plan has it
-- adopted                 nano held in the window that this one replaced at a change of plan, and by what that adopted
-- adopted_epochs          the numbers of those windows, with commas between: the last of a window's fields
-- In memory it has its length as text, too: the ledger's books are named by it.
local WINDOW_FIELDS = {'w1', 'w2', 'w3', 'w4'}

local function read_window(text)
  local refresh, finish, granted, used, held, before, epoch, first, adopted, epochs =
    string.match(text, '^(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(%d+)|(.*)$')
  local window = {
    book = refresh, refresh = refresh + 0, finish = finish + 0, granted = granted + 0, used = used + 0, held = held + 0,
    before = before + 0, epoch = epoch + 0, first = first + 0, adopted = adopted + 0, adopted_epochs = {}
  }
  if epochs ~= '' then
    for number in string.gmatch(epochs, '%d+') do table.insert(window.adopted_epochs, number + 0) end
  end
  return window
end

local function window_text(window)
  return string.format('%d|%d|%d|%d|%d|%d|%d|%d|%d|', window.refresh, window.finish, window.granted, window.used,
    window.held, window.before, window.epoch, window.first, window.adopted) .. table.concat(window.adopted_epochs, ',')
end

-- stored: the account's fields as the store has them, the numbers in the order of NUMBERS and then the windows.
local function new_account(key, plan)
  return {
    key = key, plan = plan, plan_version = 0, balance = 0, balance_held = 0, day = 0, day_used = 0, epoch = 0,
    sequence = 0, seen = 0, windows = {}, totals = {}, entries = {}, stored = {0, 0, 0, 0, 0, 0, 0}
  }
end

-- The account, or nil; and what it has in one field more, if that was asked for.
local function load_account(key, more)
  local stored = redis.call('HMGET', key, 'plan_version', 'balance', 'balance_held', 'day_used', 'epoch', 'sequence',
    'seen', 'w1', 'w2', 'w3', 'w4', 'plan', more or 'plan')
  local plan = stored[12]
  if not plan then return nil end
  local account = new_account(key, plan)
  account.stored = stored
  for i = 1, #NUMBERS do
    local name, number = NUMBERS[i], (stored[i] or 0) + 0
    stored[i], account[name] = number, number
  end
  account.day = account.seen - account.seen % DAY_MS
  for i = 1, #WINDOW_FIELDS do
    local text = stored[#NUMBERS + i]
    if not text then break end
    account.windows[i] = read_window(text)
  end
  return account, stored[13]
end

-- Write what changed, the ledger entries first. total_* are added with 64-bit arithmetic by the server itself.
local function save_account(account, ledger, name, now)
  append_entries(account, ledger, name, now)
  local stored, changed = account.stored, {}
  if account.plan ~= stored[12] then changed = {'plan', account.plan} end
  for i = 1, #NUMBERS do
    local name = NUMBERS[i]
    if account[name] ~= stored[i] then
      changed[#changed + 1] = name
      changed[#changed + 1] = account[name]
    end
  end
  for i, field in ipairs(WINDOW_FIELDS) do
    local window, before = account.windows[i], stored[#NUMBERS + i]
    local text = window and window_text(window)
    if window and text ~= before then
      changed[#changed + 1] = field
      changed[#changed + 1] = text
    elseif before and not window then
      redis.call('HDEL', account.key, field)
    end
  end
  if #changed > 0 then redis.call('HSET', account.key, unpack(changed)) end
  for total, delta in pairs(account.totals) do
    if delta ~= 0 then redis.call('HINCRBY', account.key, 'total_' .. total, delta) end
  end
end

local function add_total(account, name, delta)
  account.totals[name] = (account.totals[name] or 0) + delta
end

-- The store's time in ms, and the account's: never earlier than the latest time it has seen.
local function store_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
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

-- What the allowance can still pay: the tightest window decides.
local function allowance_free(account)
  local free
  for _, window in ipairs(account.windows) do
    free = math.min(free or MAX_NANO, window.granted - window.used - window.held - window.adopted)
  end
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
local function funds(account, now)
  local values = {account.plan, account.balance, account.balance_held, now, account.sequence}
  for _, window in ipairs(account.windows) do
    local n = #values
    values[n + 1], values[n + 2], values[n + 3] = window.refresh, window.granted, window.used
    values[n + 4], values[n + 5] = window.held + window.adopted, window.finish
  end
  return unpack(values)
end
