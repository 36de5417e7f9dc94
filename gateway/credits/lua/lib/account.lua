-- The account hash: loaded once, changed in memory, written once at the end (read → check → write).
--
-- plan, plan_version      the plan's name; a number that only grows with each change of plan
-- balance, balance_held   prepaid credits, nano
-- day_used                allowance used in the day (UTC) of the latest time seen, nano: a window that a change of plan
--                         opens counts what was used before it, so that changing back resets nothing
-- epoch                   number of windows that this account has opened; each window has a number of its own
-- sequence                number of the last ledger entry
-- seen                    latest time seen, ms: time never runs backwards for an account
-- w1 … w4                 the plan's windows, each 'refresh|finish|granted|used|…', as below
-- total_*                 lifetime sums, nano; only ever touched by HINCRBY, never by Lua's doubles
--
-- A number that was never anything but 0 is not stored. In memory there is day, too: the start of that day, ms.
--
-- Of a window:
-- refresh, finish         length and end of the window, ms
-- granted, used, held     nano; held by reservations that were made in this window
-- before                  nano that open reservations of ended windows of this length still hold
-- epoch                   this window's number
-- first                   number of the first window of this length since the plan has it
-- adopted                 nano held in the window that this one replaced at a change of plan, and by what that adopted
-- adopted_epochs          the numbers of those windows, with commas between: the last of a window's fields
-- In memory it has its length as text, too: the ledger's books are named by it. head and tail are the texts before used
-- and after held, until something in them changes (tail is nil then): to write nine numbers anew costs 10,000
-- instructions, two of them 4,000.

-- The account, or nil; and what it has in one field more, if that was asked for. new_plan: there it is opened, in memory,
-- if it is not there. Every field costs 1,800 instructions: those that few calls need are read by these calls.
local function load_account(key, new_plan, ...)
  local stored = redis.call('HMGET', key, 'balance', 'balance_held', 'day_used', 'sequence', 'seen', 'w1', 'w2', 'plan',
    ...)
  local plan, windows = stored[8] or new_plan, {}
  if not plan then return nil end
  for i = 1, 5 do stored[i] = (stored[i] or 0) + 0 end -- the numbers, in the order of save_account
  local texts = {stored[6] or nil, stored[7] or nil}
  if stored[7] then
    local more = redis.call('HMGET', key, 'w3', 'w4')
    texts[3], texts[4] = more[1] or nil, more[2] or nil
  end
  for i = 1, #texts do
    local head, refresh, finish, granted, used, held, tail, before, epoch, first, adopted, epochs =
      string.match(texts[i], '^((%d+)|(%d+)|(%d+)|)(%d+)|(%d+)(|(%d+)|(%d+)|(%d+)|(%d+)|(.*))$')
    windows[i] = {
      book = refresh, refresh = refresh + 0, finish = finish + 0, granted = granted + 0, used = used + 0,
      held = held + 0, before = before + 0, epoch = epoch + 0, first = first + 0, adopted = adopted + 0,
      adopted_epochs = epochs, head = head, tail = tail
    }
  end
  return {
    key = key, plan = plan, balance = stored[1], balance_held = stored[2], day = stored[5] - stored[5] % DAY_MS,
    day_used = stored[3], sequence = stored[4], seen = stored[5], windows = windows, changed = {},
    stored = stored, stored_windows = texts
  }, stored[9]
end

-- Have a field written when the account is saved.
local function change(account, field, value)
  local changed = account.changed
  local n = #changed
  changed[n + 1], changed[n + 2] = field, value
end

-- Write what changed, the ledger entries first. total_* are added with 64-bit arithmetic by the server itself.
local function save_account(account, ledger, name, now)
  if account.entries then append_entries(account, ledger, name, now) end
  local changed, stored, fields = account.changed, account.stored, {'w1', 'w2', 'w3', 'w4'}
  if account.balance ~= stored[1] then change(account, 'balance', account.balance) end
  if account.balance_held ~= stored[2] then change(account, 'balance_held', account.balance_held) end
  if account.day_used ~= stored[3] then change(account, 'day_used', account.day_used) end
  if account.sequence ~= stored[4] then change(account, 'sequence', account.sequence) end
  if account.seen ~= stored[5] then change(account, 'seen', account.seen) end
  for i = 1, math.max(#account.windows, #account.stored_windows) do
    local window, before, text = account.windows[i], account.stored_windows[i], nil
    if window and window.tail then
      text = window.head .. string.format('%d|%d', window.used, window.held) .. window.tail
    elseif window then
      text = string.format('%d|%d|%d|%d|%d|%d|%d|%d|%d|', window.refresh, window.finish, window.granted, window.used,
        window.held, window.before, window.epoch, window.first, window.adopted) .. window.adopted_epochs
    else
      redis.call('HDEL', account.key, fields[i])
    end
    if text and text ~= before then change(account, fields[i], text) end
  end
  if #changed > 0 then redis.call('HSET', account.key, unpack(changed)) end
  if not account.totals then return end
  for total, delta in pairs(account.totals) do
    if delta ~= 0 then redis.call('HINCRBY', account.key, 'total_' .. total, delta) end
  end
end

local function add_total(account, name, delta)
  local totals = account.totals or {}
  totals[name] = (totals[name] or 0) + delta
  account.totals = totals
end

-- The store's time in ms; or the latest time that an account has seen, should that be later.
local function store_ms(seen)
  local time = redis.call('TIME')
  local us = time[2] + 0
  local ms = time[1] * 1000 + (us - us % 1000) / 1000
  return ms < seen and seen or ms
end

-- When the first of the account's windows ends, ms; without windows, the day's end.
local function first_finish(account)
  local finish, windows = account.day + DAY_MS, account.windows
  for i = 1, #windows do
    if windows[i].finish < finish then finish = windows[i].finish end
  end
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
  return math.abs(store_ms(0) - gateway_ms) > MAX_SKEW_MS
end

-- Whether a refresh is due that must not be made.
local function skewed(account, now, gateway_ms) --#on-demand
  return now >= first_finish(account) and #account.windows > 0 and clocks_differ(gateway_ms)
end

-- What the allowance can still pay: the tightest window decides.
local function allowance_free(account)
  local free, windows = MAX_NANO, account.windows
  if #windows == 0 then return 0 end
  for i = 1, #windows do
    local window = windows[i]
    local left = window.granted - window.used - window.held - window.adopted
    if left < free then free = left end
  end
  return free > 0 and free or 0
end

local function balance_free(account)
  return account.balance - account.balance_held
end

-- What reservations in flight hold of what the plan may use now: of windows, the most that one holds.
local function held_in_flight(account, terms)
  local most, windows = 0, account.windows
  for i = 1, #windows do
    local held = windows[i].held + windows[i].adopted
    if held > most then most = held end
  end
  return terms.payg and account.balance_held + most or most
end

-- The values that every reply ends with; domain/decision.py Funds reads them.
local function funds(account, now)
  local windows = account.windows
  local window = windows[1]
  if not window then return account.plan, account.balance, account.balance_held, now, account.sequence end
  local values = {
    account.plan, account.balance, account.balance_held, now, account.sequence, window.refresh, window.granted,
    window.used, window.held + window.adopted, window.finish
  }
  for i = 2, #windows do
    local n = #values
    window = windows[i]
    values[n + 1], values[n + 2], values[n + 3] = window.refresh, window.granted, window.used
    values[n + 4], values[n + 5] = window.held + window.adopted, window.finish
  end
  return unpack(values)
end
