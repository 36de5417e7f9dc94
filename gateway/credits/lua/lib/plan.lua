-- A plan's terms, and the windows that follow from them.

-- ARGV from index i to its end: rate (ppm), payg ('1' or '0'), on_lost, then kind, amount (nano) and refresh (ms) of
-- each window.
local function read_terms(i)
  local terms = {rate = whole(ARGV[i], 'rate'), payg = ARGV[i + 1] == '1', on_lost = ARGV[i + 2], windows = {}}
  for at = i + 3, #ARGV, 3 do
    local term = {
      kind = ARGV[at], amount = whole(ARGV[at + 1], 'allowance amount'), refresh = whole(ARGV[at + 2], 'refresh')
    }
    if term.refresh < 1 or DAY_MS % term.refresh ~= 0 then error('refresh does not divide a day: ' .. ARGV[at + 2]) end
    terms.windows[#terms.windows + 1] = term
  end
  return terms
end

local function same_length(windows, refresh)
  for _, window in ipairs(windows) do
    if window.refresh == refresh then return window end
  end
end

local function new_window(account, term, now)
  local _, finish, grant = window_at(term, now)
  account.epoch = account.epoch + 1
  return {
    refresh = term.refresh, finish = finish, granted = grant, used = 0, held = 0, before = 0, epoch = account.epoch,
    first = account.epoch, adopted = 0, adopted_epochs = {}
  }
end

-- The window after one that has ended. What it still holds is held on, but no longer against what is free.
local function next_window(account, window, term, now)
  local opened = new_window(account, term, now)
  opened.first = window.first
  opened.before = window.before + window.held
  local book = tostring(term.refresh)
  local left = window.granted - window.used
  return opened, {
    {'window:' .. book, opened.granted - left}, {'lapsed:' .. book, left - window.held}, {'before:' .. book, window.held},
    {'granted:' .. book, -opened.granted}
  }
end

-- A window of a length that the account did not have. It has seen what was used since it began: never more than the
-- whole day's use, nor more than that of a window which began no later. What is in flight is held in it too.
local function first_window(account, term, now, old)
  local opened = new_window(account, term, now)
  local start = opened.finish - opened.refresh
  opened.used = account.day_used
  local parent
  for _, window in ipairs(old) do
    local covers = window.finish - window.refresh <= start and start < window.finish
    if covers then opened.used = math.min(opened.used, window.used) end
    if now < window.finish and (covers or not parent) then parent = window end
  end
  if parent then
    opened.adopted = parent.held + parent.adopted
    if parent.held > 0 then opened.adopted_epochs[1] = parent.epoch end
    if parent.adopted > 0 then
      for _, epoch in ipairs(parent.adopted_epochs) do
        opened.adopted_epochs[#opened.adopted_epochs + 1] = epoch
      end
    end
  end
  local book = tostring(term.refresh)
  return opened, {
    {'granted:' .. book, opened.used - opened.granted}, {'window:' .. book, opened.granted - opened.used}
  }
end

local function close_window(account, window)
  local book, left = tostring(window.refresh), window.granted - window.used
  add_entry(account, 'close', book, {
    {'window:' .. book, -left}, {'before:' .. book, -window.before}, {'lapsed:' .. book, left + window.before}
  }, {})
end

-- Move the account into the windows of now, as its plan has them. In memory only: a denial writes nothing.
local function roll(account, terms, now)
  local day = now - now % DAY_MS
  if day > account.day then account.day, account.day_used = day, 0 end
  local old = account.windows
  account.windows = {}
  for i, term in ipairs(terms.windows) do
    local window, postings = same_length(old, term.refresh), nil
    if not window then
      window, postings = first_window(account, term, now, old)
    elseif now >= window.finish then
      window, postings = next_window(account, window, term, now)
    end
    account.windows[i] = window
    if postings then
      add_entry(account, 'refresh', digits(term.refresh) .. ':' .. digits(window.finish), postings, {})
    end
  end
  for _, window in ipairs(old) do
    if not same_length(terms.windows, window.refresh) then close_window(account, window) end
  end
end

-- A change of plan counts at once: the windows grant what the new plan's do.
local function regrant(account, terms, now, postings)
  for i, term in ipairs(terms.windows) do
    local window, book = account.windows[i], tostring(term.refresh)
    local _, _, grant = window_at(term, now)
    post(postings, 'granted:' .. book, window.granted - grant)
    post(postings, 'window:' .. book, grant - window.granted)
    window.granted = grant
  end
end
